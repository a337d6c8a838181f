"""Reports on compiled programs, from the output of a target's compiler."""
