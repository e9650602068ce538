"""The demo: it starts the commands of the other packages and imports none of them."""
