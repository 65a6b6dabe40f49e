"""Several ranks train one model: what they tell each other, who watches them, and how a run is asked to end."""
