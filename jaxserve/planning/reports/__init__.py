"""Reports on compiled programs: what a target's compiler made of each."""
