"""What `erase compare` consists of: its spec, its tables, its page."""
