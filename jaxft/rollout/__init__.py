"""Sampling and scoring: on-policy data is just another batch source."""
