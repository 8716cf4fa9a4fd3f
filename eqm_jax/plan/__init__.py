"""What a config takes on a TPU slice, from programs compiled without one: memory, arithmetic, links."""
