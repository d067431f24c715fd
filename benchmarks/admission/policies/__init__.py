"""Ways to enforce one limit over several regions: one module each, behind `policy.Policy`."""
