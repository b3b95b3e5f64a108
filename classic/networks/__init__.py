"""Networks: layers, distributions over actions, actor and critic."""
