"""Jinja templates of chats and prompts, rendered in a sandbox."""
