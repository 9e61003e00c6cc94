"""Device profiles, host detection, prediction and comparison. Knows neither engines nor the insides of models."""
