"""Search and measure: embedding in units, re-ranking, rankings, metrics, results, galleries."""
