"""An HTTP server of a model in the form of OpenAI's API, with a chat page."""
