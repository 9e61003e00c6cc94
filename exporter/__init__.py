"""From a checkpoint to a proven artefact: plan, quantise, write, prove. Knows neither HTTP nor the console."""
