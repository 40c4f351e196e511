"""What `fastjepa bench` runs: each op against the plain formula and the official way, with the
bytes it has to move."""
