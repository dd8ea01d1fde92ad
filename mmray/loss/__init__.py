"""Which tokens train: role boundaries scanned over a whole batch at once."""

from mmray.loss.roles import RoleBoundary, role_keep_mask

__all__ = ["RoleBoundary", "role_keep_mask"]
