"""What is made of an adapter: a merged model, a GGUF file, a push to the Hub."""
