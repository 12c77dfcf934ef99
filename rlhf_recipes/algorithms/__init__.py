"""PPO, A2C, DPO, and what they train on."""
