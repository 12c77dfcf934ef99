"""How good a policy is: judged, compared with the optimum, watched."""
