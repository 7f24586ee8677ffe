"""What the engine is made of: requests, shared prefixes, lanes of rows."""
