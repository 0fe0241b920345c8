"""How is a plan given to an engine that people run: which settings realise it, and which parts has the engine no
setting for? One module an engine; in it one small function a policy."""
