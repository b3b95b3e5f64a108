"""Rewards: functions, reward models and servers, and the scores that they give."""
