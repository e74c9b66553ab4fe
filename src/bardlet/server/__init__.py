"""The server of `bardlet serve`: an OpenAI-compatible API over HTTP, and pages for the browser."""
