"""Access to the Hub: requests, cached answers, and downloads into the Hub's cache folder."""
