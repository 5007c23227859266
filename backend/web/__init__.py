"""The pages for people. They show what the services of /api say, and what a person does in them goes to /api."""
