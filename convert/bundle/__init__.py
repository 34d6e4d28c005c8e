"""A folder for a phone: recorded functions, and a runner that needs no Python of ours."""
