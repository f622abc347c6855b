"""The algebra everything hangs on: weights, the verbs that may touch them, and functions on trees of them."""
