"""Numbers only: strengths and intervals from judged pairs, the choice of the next pair, temperature."""
