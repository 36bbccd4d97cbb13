"""The formats of local files, each in a file of its own: rows as Arrow tables, a part at a time."""
