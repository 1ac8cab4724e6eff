"""The process that brings a restored machine's memory in, page by page, when somebody touches it."""
