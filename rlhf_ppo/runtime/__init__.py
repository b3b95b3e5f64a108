"""What any run needs, whatever it trains: settings, seeds, metrics, progress, its folder and its pictures."""
