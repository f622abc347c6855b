"""Where arrays live: a mesh of data x fsdp x tensor, and rules from logical axes to mesh axes."""
