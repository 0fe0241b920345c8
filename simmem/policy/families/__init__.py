"""One module a family; every module here that has no leading underscore registers a policy."""
