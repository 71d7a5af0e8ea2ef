"""The search for tiles on the user's GPU: what is called, what fits, how long it takes, what is chosen."""
