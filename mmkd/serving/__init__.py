"""What a user does with a model: predict, embed, search, calibrate, explain and serve."""
