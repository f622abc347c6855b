"""The border: what a user wrote (YAML, `key=value`) becomes frozen dataclasses, or one message that says what is wrong.

The mechanism knows no section: `jaxft/config.py` composes them. pydantic is used here and nowhere else.
"""
