"""What a run will do, need and take, told before anything is loaded; no file here imports torch."""
