"""One decoder, many families."""
