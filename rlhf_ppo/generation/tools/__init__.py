"""Tools: functions that the policy may call between its turns."""
