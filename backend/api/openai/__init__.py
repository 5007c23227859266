"""/v1: the routes of OpenAI's API, over the same services as /api."""
