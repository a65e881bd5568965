"""torch operators with their Triton launchers, one module per kernel."""
