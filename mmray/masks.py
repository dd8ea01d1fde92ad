"""Role boundaries under their public name; they live in `mmray.loss`."""

from mmray.loss.roles import RoleBoundary, role_keep_mask

__all__ = ["RoleBoundary", "role_keep_mask"]
