"""How fast everything is: the measurements of --mode=benchmark."""
