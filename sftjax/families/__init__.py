"""One file a family: a config mapping and a table of names."""
