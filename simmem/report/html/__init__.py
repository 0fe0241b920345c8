"""One self-contained page about a plan or a search: what it says as JSON, and a style and scripts written by hand that
show it. Nothing is fetched, and nothing that a document says can run."""
