"""What is asked, and the integers it means: experiment file, allocation, prices, exit codes."""
