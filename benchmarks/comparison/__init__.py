"""What ``compare.py`` trains, measures and draws: data sets, ways, runs, the table, the figure."""
