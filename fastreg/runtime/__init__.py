"""Where code runs: the backend, devices, launch parameters, and caches of compiled code."""
