"""Decides which tokens are trained on: the `loss` setting, role boundaries scanned over a batch at once, labels.

Nothing is imported here, so that reading a job file needs no torch; import from `settings`, `sources`, `roles`,
`labels`. Users have `RoleBoundary` and `role_keep_mask` from `mmray.masks`.
"""
