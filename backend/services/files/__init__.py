"""Files as OpenAI's API knows them: kept, read into datasets, and put together from parts."""
