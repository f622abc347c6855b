"""math-verify in processes of its own: computer algebra on what a model wrote may take for ever, and cannot be
interrupted in a thread."""
