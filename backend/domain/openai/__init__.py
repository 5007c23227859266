"""What OpenAI's API calls the things that there are here: ids, names, states, figures, errors. Pure translations."""
