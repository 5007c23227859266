"""Tables and repositories: rows in, rows out. No rule of the field lives here."""
