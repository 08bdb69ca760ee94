"""Training, from the ground up: loss, optim, signals, step_reports, checkpoint and folder_lock; run_folder; setup and
global_batch; trainer (the loop) and preview."""
