"""Tasks: a prompt builder, a verifier and splits."""
